"""What a tile shows, in words and numbers: prompts, outlines, attributes."""
