"""Towers' backbones: an image, a clip or a sentence goes in, a sequence of tokens with its mask comes out."""
