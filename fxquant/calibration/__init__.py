"""Which UNet calls calibrate a model, and how to get them: `record.record` takes a sampler's."""
