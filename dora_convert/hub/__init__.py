"""The Hugging Face Hub: what is read from there, and what is pushed."""
