"""What is explained and what it is compared with: prompts, references, targets."""
