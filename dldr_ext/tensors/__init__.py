"""Tensors: lists of parameters, storage formats, matrices of rows, memory."""
