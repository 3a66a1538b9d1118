"""Reviews: a tiny language model that writes film reviews of a sentence, and rules that judge them."""
