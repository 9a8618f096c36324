"""Bags of MNIST, CIFAR-10 or other instances: drawing, training, measuring, and the paper's figures."""
