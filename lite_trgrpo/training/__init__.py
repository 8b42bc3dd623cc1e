"""The loop, and what it needs beside the model."""
