"""Which latents belong to one model only: decoder norms, latent scaling, stability over seeds, causal effect."""
