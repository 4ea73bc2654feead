package engine

import (
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// TestStopWithoutGrace: without a grace period the stop signal is never sent, and a container that
// does not run is no error.
func TestStopWithoutGrace(t *testing.T) {
	for name, c := range map[string]struct {
		grace   time.Duration
		answers map[string]int // status by verb
		want    []string
		isError func(error) bool
	}{
		"running": {
			answers: map[string]int{"kill": http.StatusNoContent},
			want:    []string{"kill SIGKILL"},
		},
		"stopped": {
			answers: map[string]int{"kill": http.StatusConflict, "stop": http.StatusNotModified},
			want:    []string{"kill SIGKILL", "stop 0"},
		},
		"unknown": {
			answers: map[string]int{"kill": http.StatusNotFound},
			want:    []string{"kill SIGKILL"},
			isError: errdefs.IsNotFound,
		},
		"with grace": {
			grace:   1500 * time.Millisecond,
			answers: map[string]int{"stop": http.StatusNoContent},
			want:    []string{"stop 2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var asked []string
			e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Api-Version", "1.41")
				verb := path.Base(r.URL.Path)
				if status, ok := c.answers[verb]; ok {
					asked = append(asked,
						strings.Join([]string{verb, r.URL.Query().Get("signal") + r.URL.Query().Get("t")}, " "))
					w.WriteHeader(status)
				}
			}))

			err := e.Stop(t.Context(), model.ContainerID(idA), c.grace)
			if c.isError == nil && err != nil || c.isError != nil && !c.isError(err) {
				t.Errorf("error %v", err)
			}

			if !slices.Equal(asked, c.want) {
				t.Errorf("requests %q, want %q", asked, c.want)
			}
		})
	}
}
