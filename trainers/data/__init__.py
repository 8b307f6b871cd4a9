"""Pictures in: generated or imported, decoded once into a cache, grouped, audited."""
