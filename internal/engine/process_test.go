package engine

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"cri-dockerd/internal/model"
)

// TestProcessForPlugins checks that records have the process of a container only with NRI on.
func TestProcessForPlugins(t *testing.T) {
	id := strings.Repeat("a", 64)
	e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		switch p := r.URL.Path; {
		case strings.HasSuffix(p, "/images/sha256:"+id+"/json"):
			fmt.Fprintf(w, `{"Id":"sha256:%s"}`, id)
		case strings.HasSuffix(p, "/"+id+"/json"):
			fmt.Fprintf(w, `{"Id":%q,"Name":"/k8s_c_p_ns_u_0","Image":"sha256:%s","Path":"sh","Args":["-c"],
				"State":{"Status":"created"},"HostConfig":{},"Config":{"Env":["A=b"],"Labels":{
				"io.kubernetes.docker.type":"container","io.kubernetes.sandbox.id":%q}}}`, id, id, id)
		}
	}))

	for adjustments, want := range map[string]bool{"": false, "/run/nri": true} {
		e.cfg.Adjustments = adjustments
		o, err := e.Inspect(t.Context(), model.ContainerID(id))
		if err != nil || o.Container == nil {
			t.Fatalf("Inspect: %+v, %v", o, err)
		}

		p := o.Container.Process
		if (p != nil) != want || want && (strings.Join(p.Args, " ") != "sh -c" || p.Env[0] != "A=b") {
			t.Errorf("NRI %q: process %+v, want one: %v", adjustments, p, want)
		}
	}
}
