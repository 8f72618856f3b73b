"""What the three stages share: training and evaluation here, and four rooms: images, store, program."""
