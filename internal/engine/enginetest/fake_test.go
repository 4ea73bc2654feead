package enginetest

import "testing"

func TestFakeContract(t *testing.T) { Contract(t, NewFake(), "") }
