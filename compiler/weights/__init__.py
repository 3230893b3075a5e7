"""The bytes of parameters: where the teacher's come from, and how the student's are made of them."""
