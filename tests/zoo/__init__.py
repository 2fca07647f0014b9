"""Every denoiser class of diffusers, at its smallest, called as its pipeline calls it."""
