package enginetest

import "testing"

func TestFakeKeepsTheContract(t *testing.T) { Contract(t, NewFake(), "") }
