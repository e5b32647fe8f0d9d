"""Which adapter reaches full fine-tuning's loss, in how many steps, and what does it forget?"""
