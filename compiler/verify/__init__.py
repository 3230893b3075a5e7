"""Translation validation: is the student that was written the function that was asked for?"""
