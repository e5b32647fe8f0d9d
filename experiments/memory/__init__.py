"""What does each byte of optimizer state buy?"""
