"""Evaluation of images: Fréchet distance (FID) and Inception score of samples, reconstruction error of a tokenizer.

The way of an image, each step one file:

    sources     pixels: of a split, of an image folder, of sampled codes, of a tokenizer's reconstructions
    features    pixels -> features (`inception`: 2048 and logits, FACTS 7; `light`: 240, without downloads)
    chunks      files of a work folder, by ranges of image numbers: how ranks share the work, and how a run goes on
    moments     features -> mean and covariance, in the order of the chunks
    frechet, inception_score, classifier    the numbers
    generation  codes of samples, by their numbers
    work        the work folder: locks, the step that ranks agree on, whole files
    statistics  mean and covariance of a reference in a file
    run         what `pgm-scale eval-images` does, and `command` its options and results

Shape suffixes: B images, H W C rows, columns and channels of pixels, F features, K classes, L codes.
"""
