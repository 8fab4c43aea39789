"Medal-grade recipes for image-recognition competitions, as fastai objects"
__version__ = '0.0.1'
