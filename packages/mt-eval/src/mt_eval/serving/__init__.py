"""A server of one model: OpenAI's and Megatron's interfaces, a web page, and the thread that runs the engine."""
