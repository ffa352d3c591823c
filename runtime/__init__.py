"""Opens a bundle and decodes with it. Imports neither torch nor click.

The main path, each step a file: manifest -> bundle -> session (contract) -> generate -> text.
"""
