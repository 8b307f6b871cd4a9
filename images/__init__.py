"""From bytes to pixels: import, groups and splits, decoding, the pixel cache, quality, audit, generated images."""
