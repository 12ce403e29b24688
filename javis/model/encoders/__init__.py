"""Full-size caption encoders: T5-XXL and the text tower of ImageBind, with their text preprocessing and tokenizers."""
