"""Pictures: grids of images, and figures of what a trained model can do."""
