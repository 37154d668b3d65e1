"""A generative recommender on MovieLens-100K, from raw data to a model file: data, features, model and training."""
