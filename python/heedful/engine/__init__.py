"""From requests to text: scheduler, model and sampler in one loop."""
