"""Quality of generated images: FID and related scores, face-detection rate, nearest training images, projection."""
