"""Programs that search with other libraries; a bench runs each in its environment, as `python FILE FOLDER OPTIONS`.

They print one line of JSON. Those of `study.py`: how many trials they trained, the steps and the validation accuracy of
each, and seconds. Those of `deadline.py`: the accuracy of the model they end with, on the test images.
"""
