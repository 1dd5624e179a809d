"""Meta's own format of Llama and Mistral models: params.json and consolidated files, one for each tensor rank."""
