"""A smaller vocabulary: which tokens a corpus needs least, and a tokenizer, embeddings and head without them.

* `spelling`    what a BPE writes in the place of a token that it does not have
* `selection`   which rows stay: by counts, and never a token that another one is made of
* `tokenizer`   tokenizer.json: what must stay, what a text becomes without the rest
* `counts`      how often the tokens of a corpus occur
* `cut`         from one checkpoint folder to a smaller one: weights, ids in its configs, tokenizer

Start with `cut`. Only it imports torch; layers are left as they are, so that no plan speaks of a vocabulary.
"""
