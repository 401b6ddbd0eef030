"""Why a checkpoint does not load, in words: the causes that people meet, the rules that help, and when nothing can.

Pure: manifests and facts of a file in, findings out. Nothing here opens a file.
"""
