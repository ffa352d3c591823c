"""checkpoint -> bundle -> engine, and how far each is from the reference.

The main path, each step a file: recipe -> config -> checkpoint -> (model -> trace) + quantize -> build -> validate.
"""
