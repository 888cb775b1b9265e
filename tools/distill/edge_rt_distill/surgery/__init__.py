"""From a teacher and a budget to a smaller architecture with the teacher's weights, repaired by least squares."""
