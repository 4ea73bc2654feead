package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// object is a Kubernetes object, as JSON has it.
type object = map[string]any

// apiServer is as much of Kubernetes' API as a kubelet needs to run the pods that are there from the beginning, with their secrets.
type apiServer struct {
	mu      sync.Mutex          // guards the rest
	objects map[string][]object // by collection: "/api/v1/namespaces/default/secrets"
	events  []object
}

// kinds are the collections that a kubelet reads, with the kind of their elements.
var kinds = map[string]string{
	"pods": "Pod", "services": "Service", "secrets": "Secret", "nodes": "Node", "configmaps": "ConfigMap", "runtimeclasses": "RuntimeClass", "csidrivers": "CSIDriver", "csinodes": "CSINode",
	"leases": "Lease",
}

// node is the node of a kubelet, with what was last said of it.
func node(conditions ...object) object {
	room := object{"pods": "10", "cpu": "2", "memory": "8Gi", "ephemeral-storage": "10Gi"}
	return object{
		"kind": "Node", "apiVersion": "v1", "metadata": object{"name": "node", "resourceVersion": "1"},
		"status": object{"conditions": conditions, "capacity": room, "allocatable": room},
	}
}

// kubeconfig is the file by which a kubelet finds the API at an address.
func (k *kubelet) kubeconfig(t *testing.T, addr net.Addr) string {
	t.Helper()
	file := filepath.Join(k.engine.Dir, "kubeconfig")
	if err := os.WriteFile(file, []byte("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'http://"+addr.String()+
		"'}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// serveAPI serves the API until the test ends.
func serveAPI(t *testing.T, l net.Listener, objects map[string][]object) *apiServer {
	t.Helper()
	a := &apiServer{objects: objects}
	srv := &http.Server{Handler: a}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	return a
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	kind, isCollection := kinds[path.Base(q.URL.Path)]
	switch {
	case q.Method == http.MethodGet && isCollection && q.FormValue("sendInitialEvents") != "":
		fail(w, http.StatusUnprocessableEntity, "Invalid") // so that it lists and then watches
	case q.Method == http.MethodGet && isCollection && q.FormValue("watch") != "":
		_ = http.NewResponseController(w).Flush()
		<-q.Context().Done() // nothing changes
	case q.Method == http.MethodGet && isCollection:
		version, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(q.URL.Path, "/apis/"), "/api/"), "/"+path.Base(q.URL.Path))
		answer(w, object{"kind": kind + "List", "apiVersion": version, "metadata": object{"resourceVersion": "1"}, "items": a.list(q.URL.Path, q.FormValue("fieldSelector"))})
	case q.Method == http.MethodGet:
		if o := a.find(q.URL.Path); o != nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			answer(w, o)
			return
		}
		fail(w, http.StatusNotFound, "NotFound")
	case q.Method == http.MethodPost:
		a.post(w, q)
	case q.Method == http.MethodPatch && path.Dir(q.URL.Path) == "/api/v1/nodes/node":
		a.patchNode(w, q)
	default: // of a status, mostly
		if o := a.find(strings.TrimSuffix(q.URL.Path, "/status")); o != nil {
			answer(w, o)
			return
		}
		fail(w, http.StatusNotFound, "NotFound")
	}
}

func answer(w io.Writer, o object) { _ = json.NewEncoder(w).Encode(o) }

func fail(w http.ResponseWriter, code int, reason string) {
	w.WriteHeader(code)
	answer(w, object{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code})
}

// list is what lies in a collection, also in namespaces beneath it, of the name that a selector asks for.
func (a *apiServer) list(collection, selector string) []object {
	a.mu.Lock()
	defer a.mu.Unlock()
	name, _ := strings.CutPrefix(selector, "metadata.name=")
	if name == selector {
		name = ""
	}
	out := []object{}
	for c, objects := range a.objects {
		if c != collection && !(path.Base(c) == path.Base(collection) && path.Dir(collection) == "/api/v1") {
			continue
		}
		for _, o := range objects {
			if name == "" || o["metadata"].(object)["name"] == name {
				out = append(out, o)
			}
		}
	}
	return out
}

func (a *apiServer) find(file string) object {
	for _, o := range a.list(path.Dir(file), "metadata.name="+path.Base(file)) {
		return o
	}
	return nil
}

func (a *apiServer) post(w http.ResponseWriter, q *http.Request) {
	var o object
	if err := json.NewDecoder(q.Body).Decode(&o); err != nil {
		fail(w, http.StatusBadRequest, "BadRequest")
		return
	}
	a.mu.Lock()
	exists := false
	for _, other := range a.objects[q.URL.Path] {
		exists = exists || other["metadata"].(object)["name"] == o["metadata"].(object)["name"]
	}
	if path.Base(q.URL.Path) == "events" {
		a.events = append(a.events, o)
	} else if !exists {
		a.objects[q.URL.Path] = append(a.objects[q.URL.Path], o)
	}
	a.mu.Unlock()
	if exists {
		fail(w, http.StatusConflict, "AlreadyExists")
		return
	}
	w.WriteHeader(http.StatusCreated)
	answer(w, o)
}

// patchNode takes what a kubelet says of its node's conditions (a strategic merge patch, by type).
func (a *apiServer) patchNode(w http.ResponseWriter, q *http.Request) {
	var patch struct{ Status struct{ Conditions []object } }
	if err := json.NewDecoder(q.Body).Decode(&patch); err != nil {
		fail(w, http.StatusBadRequest, "BadRequest")
		return
	}
	o := a.find("/api/v1/nodes/node")
	a.mu.Lock()
	defer a.mu.Unlock()
	status := o["status"].(object)
	old, _ := status["conditions"].([]object)
	var conditions []object
	byType := map[any]object{}
	for _, c := range append(slices.Clone(old), patch.Status.Conditions...) {
		merged, known := byType[c["type"]]
		if !known {
			merged = object{}
			byType[c["type"]] = merged
			conditions = append(conditions, merged)
		}
		maps.Copy(merged, c)
	}
	status["conditions"] = conditions
	answer(w, o)
}

// condition is one of the node's conditions, nil if the kubelet has not told it.
func (a *apiServer) condition(kind string) object {
	o := a.find("/api/v1/nodes/node")
	a.mu.Lock()
	defer a.mu.Unlock()
	conditions, _ := o["status"].(object)["conditions"].([]object)
	for _, c := range conditions {
		if c["type"] == kind {
			return maps.Clone(c)
		}
	}
	return nil
}

// said says whether an event of a pod has these words.
func (a *apiServer) said(pod, words string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.events {
		if about, _ := e["involvedObject"].(object); about["name"] == pod && strings.Contains(fmt.Sprint(e["message"]), words) {
			return true
		}
	}
	return false
}
