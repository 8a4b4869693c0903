"""What runs inside Ray while a family is distilled. Importing this package imports nothing heavy."""
