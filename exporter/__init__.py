"""checkpoint -> bundle -> engine, and how far each is from the reference.

The main path, each step a file: recipe -> config -> source/checkpoint -> plan -> (model -> trace) + storage -> build ->
tensorrt/builder -> validate.
"""
