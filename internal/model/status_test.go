package model

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMatchSandbox(t *testing.T) {
	s := &Sandbox{ID: "abcdef", Running: true, Labels: map[string]string{"a": "1", "b": "2"}}
	notReady := &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}

	for _, c := range []struct {
		f    *runtimeapi.PodSandboxFilter
		want bool
	}{
		{nil, true}, {&runtimeapi.PodSandboxFilter{Id: "abc"}, true}, {&runtimeapi.PodSandboxFilter{Id: "bcd"}, false},
		{&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"a": "1"}}, true},
		{&runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"a": ""}}, false},
		{&runtimeapi.PodSandboxFilter{State: notReady}, false},
	} {
		if got := MatchSandbox(c.f, s); got != c.want {
			t.Errorf("%v: %v", c.f, got)
		}
	}
}
