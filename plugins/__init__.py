"""The ops of the `glm` domain, one folder each, in all their forms."""
