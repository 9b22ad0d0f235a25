"Models and texts, from the package, from folders, or from the hub."
