"""Model servers to test against: a real one (llama.cpp) and one that misbehaves on request."""
