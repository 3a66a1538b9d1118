"""Chess moves and their win probabilities, labelled by Stockfish: a value-learning problem without an agent."""
