"""The classifier experiments: network, augmentation, arms, predictions, features."""
