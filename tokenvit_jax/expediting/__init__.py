"""Makes trained models faster without training: token reducers and clustered tokens."""
