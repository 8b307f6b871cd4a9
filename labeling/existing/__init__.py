"""Label Studio projects that somebody else made: their labeling page, their images, their annotations, and links."""
