"""Tasks of fine-tuning: labelled files -> samples, a model's outputs -> predictions and figures. No torch."""
