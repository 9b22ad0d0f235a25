"Models, texts and files, from the package, from folders, or from the hub."
