"""What do an output layer and its loss cost here, with and without logits in memory?"""
