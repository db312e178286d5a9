"""What a model is worth: perplexity, stock lm-eval tasks and speed. Model, tokenizer and texts in, report out."""
