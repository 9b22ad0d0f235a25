"What softmax attention has, and which attentions keep it."
