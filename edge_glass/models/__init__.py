"""From tokens to aligned embeddings: pooling, resampling, projection, alignment and its losses."""
