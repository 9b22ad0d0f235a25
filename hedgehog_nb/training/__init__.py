"Distil the maps, finetune the model, save and resume."
